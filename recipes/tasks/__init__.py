"""The tasks that ``apportion-train`` trains: their LightningModules, and their data from files, the hub, or made up."""
