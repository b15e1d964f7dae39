// Package architecture tests the structure of the code: no package imports its parent, the imports between top-level
// folders form no cycle, the product imports no test code, files, functions and types do not become too large, and the
// root module and the module e2e require the same versions. It protects against code that cannot be read from the top
// down, such as a package that imports its parent, or a type to which everything is attached.
package architecture
