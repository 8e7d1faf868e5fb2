"""What tests need, the project's own and those of its users; nothing in the library imports it."""
