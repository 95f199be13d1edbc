"""PEFT's own test-suite, pointed at `SensiConfig`."""
