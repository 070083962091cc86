"""Records a network's forward as a program, by TorchDynamo."""
