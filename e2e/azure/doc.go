// Package azure stands in for Azure in end-to-end tests, the demo and the
// benchmarks: the Instance Metadata Service (IMDS), Entra ID and the part of
// Azure Resource Manager (ARM) that attaches identities to machines.
//
// It exists to prove what Pod Identity protects against. It is therefore as
// permissive as the real IMDS is known to be (it reads a backslash as a slash,
// collapses doubled slashes, ignores the case of /metadata), so that a request
// which slips past NMI really earns a token here, and it tells nodes and pods
// apart by source address, so that such a request is seen and counted. Tokens
// are real JWTs signed with the stand-in's own key: a test can check that a
// pod got its own identity's token and nobody else's.
//
// Run serves until its context ends. A Client talks to it over a unix socket,
// which also works from another network namespace: it registers identities
// and applications, throws the fault switches, and reads the request log.
// An identity yields a token on a node if it was attached to that node by the
// Client, or through ARM to the virtual machine or scale set beneath it. ARM
// can also be had alone and in process: see NewARM.
//
// A request goes one way: service (log, faults) -> imds or entra (the
// protocol) -> directory (who exists and is attached where) -> issuer (the
// token).
package azure
