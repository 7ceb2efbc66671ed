"""Many adapters on one model: managed, swapped, combined, told apart."""
