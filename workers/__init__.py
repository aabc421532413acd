"""What prefill and decode workers share: the step thread, the direct channel to ingresses, both composed."""
