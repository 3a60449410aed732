"""Numbers one can trust: records, tables, checks of the attack, ablations."""
