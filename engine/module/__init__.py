"""An accelerated network as an `nn.Module`: checks of arguments, delegation to the network, refusals and locks."""
