"""What runs networks: devices, and weights from files to sessions."""
