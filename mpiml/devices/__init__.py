"""Devices on which PyTorch modules compute: the host, the GPU of a rank, and a pretended one for tests."""
