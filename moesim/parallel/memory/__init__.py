"""The memory of every pipeline rank: what it holds, moment by moment, and what to change where that does not fit."""
