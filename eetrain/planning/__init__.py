"""What a pipeline will cost before there is one: FLOPs, memory, the schedule in time; pure arithmetic, no processes."""
