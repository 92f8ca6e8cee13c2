"""What is to be trained: fields, stages, trials, arms, and the plan."""
