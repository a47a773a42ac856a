"""What a run's directory says about the run, as pages that stand alone and as text: nothing here trains or evaluates."""
