"""The training engine: loop, data order, codec, publish and restore. Needs torch; speaks no HTTP."""
