"""The engine: ConvNets on images of any size, exactly, in the memory you have."""
