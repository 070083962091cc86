"""What surrounds the recorded forward: state that it changes, what it depends on, and the process it runs in."""
