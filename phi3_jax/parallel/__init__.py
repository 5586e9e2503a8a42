"""How a run is spread over devices: the mesh, the rules of sharding, and many hosts."""
