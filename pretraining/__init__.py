"""What SimCLR and VICReg share: encoder, schedule, data, loop and probes."""
