"""What the exit status of a learner, or of the launcher, says."""

FINISHED = 0
FAILED = 1  # of a learner: a restart may help
# A restart would fail in the same way: bad settings, data, rewards, an unusable checkpoint.
NO_RESTART = 3
STOPPED = 130  # on request, with its state saved; of the launcher: also at once, by a second Ctrl-C
