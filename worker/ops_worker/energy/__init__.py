"""Joules: meters of devices, the sampler that reads them beside the training, and what is booked from them."""
