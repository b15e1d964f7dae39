//go:build race

package mic

const defaultSequences = 300
