"""The only room that changes a model: classes, properties, graphs, all or nothing."""
