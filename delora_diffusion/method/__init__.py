"""The paper, with torch alone: the adapter, where it goes in a module, and its updates as thin factors."""
