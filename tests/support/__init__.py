"""What the tests share: stand-ins, damage, and networks to try the library on."""
