"""How convolutions, linear layers and updates are computed, on each kind of device."""
