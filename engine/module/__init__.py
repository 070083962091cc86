"""An accelerated network as a module: what it is given, leaves to the network and refuses, and whose turn it is."""
