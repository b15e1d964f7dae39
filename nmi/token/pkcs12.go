package token

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"software.sslmate.com/src/go-pkcs12"

	"github.com/podidentity/podidentity/internal/text"
)

// A PKCS#12 file specifies the number of hash iterations that are needed to open it. Some of these numbers are in the
// encrypted part of the file, so NMI cannot check them before it opens the file. A file of some hundred bytes can keep
// a CPU busy for days. Therefore NMI opens the file in a child process, which runs the same program. The kernel kills
// the child process when it has used more CPU time than pkcs12CPU.

// ParseCommand is the argument with which this program starts itself to run [ParsePKCS12Main].
const ParseCommand = "parse-pkcs12"

const (
	pkcs12CPU        = 2 * time.Second // CPU time of the child process; usual files take some milliseconds
	pkcs12Timeout    = 5 * time.Second // wall clock time
	pkcs12Memory     = 128 << 20       // bytes that the child process may add to those it has at its start
	pkcs12Concurrent = 2
	pkcs12Message    = 1 << 20 // maximum bytes of the request, and of the response
)

type pkcs12Request struct {
	File     []byte
	Password string
}

// pkcs12Response has either Key and Certificates, or WrongPassword, or Problem.
type pkcs12Response struct {
	Key           []byte // PKCS#8
	Certificates  [][]byte
	WrongPassword bool
	Problem       string
}

// ParsePKCS12Main reads a PKCS#12 file from stdin and writes its contents to stdout. It sets permanent limits on the
// whole process, so the process must not do anything else.
func ParsePKCS12Main(stdin io.Reader, stdout io.Writer) error {
	if err := limitProcess(); err != nil {
		return fmt.Errorf("setting the resource limits of the process: %w", err)
	}
	var q pkcs12Request
	if err := json.NewDecoder(io.LimitReader(stdin, pkcs12Message)).Decode(&q); err != nil {
		return fmt.Errorf("reading the request with the PKCS#12 file from stdin: %w", err)
	}
	return json.NewEncoder(stdout).Encode(decodePKCS12(q))
}

func limitProcess() error {
	f, err := os.Open("/proc/self/statm")
	if err != nil {
		return err
	}
	defer f.Close()
	// The limit is on the data segment, not on the address space: the Go runtime reserves address space that it does
	// not use.
	var size, resident, shared, text, lib, data uint64
	if _, err := fmt.Fscan(f, &size, &resident, &shared, &text, &lib, &data); err != nil {
		return err
	}
	seconds := uint64(pkcs12CPU / time.Second)
	memory := data*uint64(os.Getpagesize()) + pkcs12Memory
	for resource, limit := range map[int]uint64{unix.RLIMIT_CPU: seconds, unix.RLIMIT_CORE: 0, unix.RLIMIT_DATA: memory} {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
			return err
		}
	}
	// As in the parent process, prevent core dumps, and access to the memory by processes without CAP_SYS_PTRACE: the
	// memory contains the private key.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return err
	}
	debug.SetMemoryLimit(pkcs12Memory / 2)
	runtime.GOMAXPROCS(1)
	// Set the lowest priority, so that the other processes of the node have precedence. The call for the process group,
	// which contains only this process, sets the priority of all its threads.
	return unix.Setpriority(unix.PRIO_PGRP, 0, 19)
}

func decodePKCS12(q pkcs12Request) (answer pkcs12Response) {
	defer func() {
		if recover() != nil {
			answer = pkcs12Response{Problem: "the parser panicked"}
		}
	}()
	key, own, others, err := pkcs12.DecodeChain(q.File, q.Password)
	switch {
	case errors.Is(err, pkcs12.ErrIncorrectPassword) || errors.Is(err, pkcs12.ErrDecryption):
		return pkcs12Response{WrongPassword: true}
	case err != nil:
		// The error texts of the library contain names of structures and algorithms, but nothing secret from the file.
		return pkcs12Response{Problem: err.Error()}
	}
	if answer.Key, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return pkcs12Response{Problem: err.Error()}
	}
	answer.Certificates = append(answer.Certificates, own.Raw)
	for _, cert := range others {
		answer.Certificates = append(answer.Certificates, cert.Raw)
	}
	return answer
}

// contents returns the keys and certificates in the response, or a flaw if the response says that the file could not be
// opened. hadPassword says whether the Secret has a password.
func (a pkcs12Response) contents(hadPassword bool) (contents, error) {
	var found contents
	switch {
	case a.WrongPassword && hadPassword:
		return found, flaw("has a PKCS#12 file under the key \"certificate\" that the password under the key \"password\" does not open; write the password of the file")
	case a.WrongPassword:
		return found, flaw("has a PKCS#12 file under the key \"certificate\" that requires a password; write it under the key \"password\"")
	case a.Problem != "":
		return found, flaw("has data under the key \"certificate\" that cannot be read as PKCS#12 (" + text.OneLine(a.Problem, 200) + "); " + writeCertificate)
	}
	for _, der := range a.Certificates {
		if err := found.addCertificate(der); err != nil {
			return found, err
		}
	}
	return found, found.addKey(a.Key, x509.ParsePKCS8PrivateKey)
}

// pkcs12Opener opens each file in a child process.
type pkcs12Opener struct {
	program string
	timeout time.Duration // wall clock time
	running chan struct{}
}

func newPKCS12Opener() *pkcs12Opener {
	return &pkcs12Opener{program: "/proc/self/exe", timeout: pkcs12Timeout, running: make(chan struct{}, pkcs12Concurrent)}
}

// open is an [unlocker].
func (o *pkcs12Opener) open(ctx context.Context, file []byte, password string) (contents, error) {
	question, err := json.Marshal(pkcs12Request{file, password})
	if err != nil {
		return contents{}, err
	}
	select {
	case o.running <- struct{}{}:
		defer func() { <-o.running }()
	case <-ctx.Done():
		return contents{}, fmt.Errorf("waiting while other PKCS#12 files are opened: %w", ctx.Err())
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	stdout := &limitedBuffer{limit: pkcs12Message}
	child := exec.CommandContext(ctx, o.program, ParseCommand)
	child.Args[0] = os.Args[0]
	child.Env = []string{}
	child.Stdin, child.Stdout = bytes.NewReader(question), stdout
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	child.WaitDelay = time.Second
	// The kernel sends Pdeathsig when the thread that started the child ends. So that thread must not end before the
	// child.
	runtime.LockOSThread()
	err = child.Run()
	runtime.UnlockOSThread()
	if err != nil {
		return contents{}, childError(ctx, child.ProcessState, err)
	}
	var answer pkcs12Response
	if err := json.Unmarshal(stdout.Bytes(), &answer); err != nil {
		return contents{}, fmt.Errorf("reading the output of the child process that opens a PKCS#12 file: %w", err)
	}
	return answer.contents(password != "")
}

// childError returns a flaw if the child process was killed after it had used up its CPU time, otherwise the reason why
// the child process failed.
func childError(ctx context.Context, state *os.ProcessState, err error) error {
	if state != nil && !state.Exited() && state.UserTime()+state.SystemTime() > pkcs12CPU-pkcs12CPU/4 {
		return flaw(fmt.Sprintf("has a PKCS#12 file under the key \"certificate\" that takes more than %d s of CPU time to open; export the file again with fewer iterations", pkcs12CPU/time.Second))
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return fmt.Errorf("opening a PKCS#12 file in a child process: %w", err)
}

// limitedBuffer is a buffer whose Write fails if the buffer would then have more bytes than limit.
type limitedBuffer struct {
	bytes.Buffer
	limit int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.limit {
		return 0, errors.New("the output of the child process that opens a PKCS#12 file is too long")
	}
	return b.Buffer.Write(p)
}
