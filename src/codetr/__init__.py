"""codetr: Co-DETR and Group DETR."""
