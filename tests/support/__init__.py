"""What the tests share: tiny models and runs, stand-ins for what is on the network, and damage to be found."""
