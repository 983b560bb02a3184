"""What is computed: element types, geometry, problems and operations. Pure."""
