"""Trains and runs ConvNets on images of any size, exactly, in the memory you have."""
