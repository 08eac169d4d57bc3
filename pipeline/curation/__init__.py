"""Which downloaded pairs are kept: the rules' decisions first, then steps that compare pairs with one another."""
