"""The client of Whet."""
