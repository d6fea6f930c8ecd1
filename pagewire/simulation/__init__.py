"""A recorded run's scheduling without a worker: the real core, called again under a virtual clock.

exact      the recorded calls in the recorded order: every plan must be the recorded one
    batch      what each step has to do, from the plans alone
    costs      what it cost: a cost model fitted to the recorded step times
    what_if    what other settings would have given, by that model
"""
