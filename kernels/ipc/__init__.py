"""Memory of one GPU shared by processes: physical regions, host images, and how they are passed.

A landlord makes regions (`physical`) and images (`image`) and sends them as file descriptors; a
tenant maps them (`kernels.device.Window`, `Device.pin`). Nothing here decides when.
"""
