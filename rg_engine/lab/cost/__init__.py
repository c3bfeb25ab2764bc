"""What guidance costs, in time, operations and bytes."""
