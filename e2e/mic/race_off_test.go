//go:build !race

package mic

const defaultSequences = 10_000
