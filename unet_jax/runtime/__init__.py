"""The outside world, one door each: devices, disk, console, signals."""
