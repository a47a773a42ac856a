"""What a directory says about its run, as pages that stand alone and as text: nothing here trains or evaluates."""
