"""What usage costs, and how far budgets are used up."""
