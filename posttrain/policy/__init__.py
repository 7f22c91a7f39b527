"""What stages with a policy gradient share: roll-outs, rewards, TRL's trainer behind ours, rails."""
