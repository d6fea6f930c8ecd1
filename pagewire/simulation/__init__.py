"""A recorded run's scheduling without a worker: the real core, called again under a virtual clock.

exact      the recorded calls in the recorded order: every plan must be the recorded one
"""
