"""Ranks of one run: how they find each other, agree before anything trains, take their devices and start again."""
