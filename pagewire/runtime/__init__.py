"""The small toolkit of every Pagewire process: settings, start-up errors, channels, readiness, logs, rich statuses.

It holds no policy, and it imports neither a role nor a model library, so a scheduler can use it as it is.
"""
