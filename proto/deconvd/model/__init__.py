"""The computation without I/O: element types, geometry, problems and operations."""
