"""Tests of the gateway, against a scheduler that the tests play themselves."""
