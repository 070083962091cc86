"""gigamorph: train and run ConvNets on gigapixel images."""
def main() -> None: print("x")
