"""The trainer that all methods share: settings, loop, guard, stops, progress bar."""
