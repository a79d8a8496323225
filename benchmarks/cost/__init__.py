"""What CLDA costs: times and memory beside frozen-teacher KD and beside other packages, judged by budgets."""
