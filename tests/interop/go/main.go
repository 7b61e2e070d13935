// Command node is one go-libp2p node that does what the tests say: a JSON object a line comes in, one a line
// goes out, as with ../js/node.mjs.
//
//	{"id": 1, "op": "dial", "address": "/ip4/…"}   ->   {"id": 1, "result": …} or {"id": 1, "error": "…"}
//
// It is put together by hand, of TCP, Noise and Yamux alone: the usual constructor brings QUIC and WebRTC, and
// takes three times as long to build.  go-libp2p's own Kademlia is no part of it; `kad.go` speaks for itself.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ma "github.com/multiformats/go-multiaddr"
)

const patience = 20 * time.Second // for anything asked of another node

type request struct {
	ID       int      `json:"id"`
	Op       string   `json:"op"`
	Listen   []string `json:"listen"`
	Relay    bool     `json:"relay"`
	Address  string   `json:"address"`
	Peer     string   `json:"peer"`
	Protocol string   `json:"protocol"`
	Size     int      `json:"size"`
	Send     string   `json:"send"`
	Count    int      `json:"count"`
	Key      string   `json:"key"`
}

type node struct {
	host    host.Host
	around  []string // circuits by which we are reached
	resumed chan struct{}
}

func (n *node) start(ctx context.Context, r request) (any, error) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, err
	}
	me, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, err
	}
	store, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, err
	}
	if err := store.AddPrivKey(me, key); err != nil {
		return nil, err
	}
	if err := store.AddPubKey(me, key.GetPublic()); err != nil {
		return nil, err
	}
	bus := eventbus.NewBus()
	net, err := swarm.NewSwarm(me, store, bus)
	if err != nil {
		return nil, err
	}
	muxers := []upgrader.StreamMuxer{{ID: yamux.ID, Muxer: yamux.DefaultTransport}}
	secure, err := noise.New(noise.ID, key, muxers)
	if err != nil {
		return nil, err
	}
	up, err := upgrader.New([]sec.SecureTransport{secure}, muxers, nil, nil, nil)
	if err != nil {
		return nil, err
	}
	plain, err := tcp.NewTCPTransport(up, nil, nil)
	if err != nil {
		return nil, err
	}
	if err := net.AddTransport(plain); err != nil {
		return nil, err
	}
	h, err := basichost.NewHost(net, &basichost.HostOpts{EventBus: bus, EnablePing: true, UserAgent: "go-libp2p/test"})
	if err != nil {
		return nil, err
	}
	n.host = h
	if err := client.AddTransport(h, up); err != nil {
		return nil, err
	}
	if len(r.Listen) == 0 {
		r.Listen = []string{"/ip4/127.0.0.1/tcp/0"}
	}
	h.Start()
	for _, where := range r.Listen {
		if relay, circuit := strings.CutSuffix(where, "/p2p-circuit"); circuit {
			info, err := peer.AddrInfoFromString(relay)
			if err != nil {
				return nil, err
			}
			if _, err := client.Reserve(ctx, h, *info); err != nil {
				return nil, err
			}
			n.around = append(n.around, fmt.Sprintf("%s/p2p/%s", where, me))
		} else if err := net.Listen(ma.StringCast(where)); err != nil {
			return nil, err
		}
	}
	if r.Relay {
		if _, err := relay.New(h); err != nil {
			return nil, err
		}
	}
	return n.whoami(ctx, r)
}

func (n *node) whoami(context.Context, request) (any, error) {
	addresses := n.around
	for _, address := range n.host.Addrs() {
		addresses = append(addresses, fmt.Sprintf("%s/p2p/%s", address, n.host.ID()))
	}
	return map[string]any{"peer": n.host.ID().String(), "addresses": addresses}, nil
}

// reach has a connection to the peer of an address or a name, which it tells.
func (n *node) reach(ctx context.Context, address string) (peer.ID, error) {
	if !strings.HasPrefix(address, "/") {
		id, err := peer.Decode(address)
		if err != nil {
			return "", err
		}
		return id, n.host.Connect(ctx, peer.AddrInfo{ID: id})
	}
	info, err := peer.AddrInfoFromString(address)
	if err != nil {
		return "", err
	}
	return info.ID, n.host.Connect(ctx, *info)
}

func (n *node) dial(ctx context.Context, r request) (any, error) {
	id, err := n.reach(ctx, r.Address)
	if err != nil {
		return nil, err
	}
	conn := n.host.Network().ConnsToPeer(id)[0]
	return map[string]any{
		"peer":       id.String(),
		"limited":    conn.Stat().Limited,
		"encryption": conn.ConnState().Security,
		"muxer":      conn.ConnState().StreamMultiplexer,
	}, nil
}

func (n *node) ping(ctx context.Context, r request) (any, error) {
	id, err := n.reach(ctx, r.Address)
	if err != nil {
		return nil, err
	}
	result := <-ping.Ping(ctx, n.host, id)
	return result.RTT.Seconds() * 1000, result.Error
}

func (n *node) known(_ context.Context, r request) (any, error) {
	id, err := peer.Decode(r.Peer)
	if err != nil {
		return nil, err
	}
	agent, err := n.host.Peerstore().Get(id, "AgentVersion")
	if err != nil {
		return nil, err
	}
	protocols, err := n.host.Peerstore().GetProtocols(id)
	if err != nil {
		return nil, err
	}
	addresses := []string{}
	for _, address := range n.host.Peerstore().Addrs(id) {
		addresses = append(addresses, address.String())
	}
	return map[string]any{"agent": agent, "protocols": protocols, "addresses": addresses}, nil
}

func (n *node) open(ctx context.Context, address, name string) (network.Stream, error) {
	id, err := n.reach(network.WithAllowLimitedConn(ctx, "test"), address)
	if err != nil {
		return nil, err
	}
	stream, err := n.host.NewStream(network.WithAllowLimitedConn(ctx, "test"), id, protocol.ID(name))
	if err == nil {
		err = stream.SetDeadline(time.Now().Add(patience))
	}
	return stream, err
}

// flood sends as fast as the stream takes it, and tells what was said to that.
func (n *node) flood(ctx context.Context, r request) (any, error) {
	stream, err := n.open(ctx, r.Address, r.Protocol)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	const piece = 65536
	waits := 0
	for sent := 0; sent < r.Size; sent += piece {
		began := time.Now()
		if _, err := stream.Write(bytes.Repeat([]byte{byte(sent / piece)}, min(piece, r.Size-sent))); err != nil {
			return nil, err
		}
		if time.Since(began) > time.Millisecond {
			waits++
		}
	}
	if err := stream.CloseWrite(); err != nil {
		return nil, err
	}
	said, err := io.ReadAll(stream)
	return map[string]any{"waits": waits, "said": string(said)}, err
}

func (n *node) talk(ctx context.Context, r request) (any, error) {
	stream, err := n.open(ctx, r.Address, r.Protocol)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	send, err := hex.DecodeString(r.Send)
	if err != nil {
		return nil, err
	}
	if _, err := stream.Write(send); err != nil {
		return nil, err
	}
	got := make([]byte, r.Count)
	_, err = io.ReadFull(stream, got)
	return hex.EncodeToString(got), err
}

func (n *node) echo(_ context.Context, r request) (any, error) {
	n.host.SetStreamHandler(protocol.ID(r.Protocol), func(stream network.Stream) {
		defer stream.Close()
		came := make(chan []byte, 1024) // who speaks may first say all, and listen then
		go func() {
			defer close(came)
			for {
				piece := make([]byte, 1<<14)
				size, err := stream.Read(piece)
				came <- piece[:size]
				if err != nil {
					return
				}
			}
		}()
		for piece := range came {
			if _, err := stream.Write(piece); err != nil {
				_ = stream.Reset()
			}
		}
	})
	return nil, nil
}

// swallow takes nothing before `resume`, then all, and answers what it was.
func (n *node) swallow(_ context.Context, r request) (any, error) {
	n.host.SetStreamHandler(protocol.ID(r.Protocol), func(stream network.Stream) {
		defer stream.Close()
		<-n.resumed
		data, _ := io.ReadAll(stream)
		sum := sha256.Sum256(data)
		_ = json.NewEncoder(stream).Encode(map[string]any{"bytes": len(data), "sha256": hex.EncodeToString(sum[:])})
	})
	return nil, nil
}

func (n *node) resume(context.Context, request) (any, error) {
	close(n.resumed)
	return nil, nil
}

func (n *node) connections(context.Context, request) (any, error) {
	all := []any{}
	for _, conn := range n.host.Network().Conns() {
		all = append(all, map[string]any{
			"peer": conn.RemotePeer().String(), "address": conn.RemoteMultiaddr().String(), "limited": conn.Stat().Limited,
		})
	}
	return all, nil
}

// provide announces a key to the server that we are told of.
func (n *node) provide(ctx context.Context, r request) (any, error) {
	key, err := hex.DecodeString(r.Key)
	if err != nil {
		return nil, err
	}
	stream, err := n.open(ctx, r.Address, kademlia)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	return nil, tell(stream, addProvider(key, peer.AddrInfo{ID: n.host.ID(), Addrs: n.host.Addrs()}))
}

// find asks the server that we are told of, and remembers the addresses that it tells.
func (n *node) find(ctx context.Context, r request) (any, error) {
	key, err := hex.DecodeString(r.Key)
	if err != nil {
		return nil, err
	}
	stream, err := n.open(ctx, r.Address, kademlia)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	if err := tell(stream, getProviders(key)); err != nil {
		return nil, err
	}
	answer, err := hear(stream)
	if err != nil {
		return nil, err
	}
	found := map[string][]string{}
	for _, provider := range answer {
		found[provider.ID.String()] = []string{}
		for _, address := range provider.Addrs {
			found[provider.ID.String()] = append(found[provider.ID.String()], address.String())
		}
		n.host.Peerstore().AddAddrs(provider.ID, provider.Addrs, peerstore.TempAddrTTL)
	}
	return found, nil
}

func main() {
	n := &node{resumed: make(chan struct{})}
	ops := map[string]func(context.Context, request) (any, error){
		"start": n.start, "whoami": n.whoami, "dial": n.dial, "ping": n.ping, "known": n.known, "flood": n.flood,
		"talk": n.talk, "echo": n.echo, "swallow": n.swallow, "resume": n.resume, "connections": n.connections,
		"provide": n.provide, "find": n.find,
	}
	var saying sync.Mutex
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 8<<20)
	for lines.Scan() {
		var r request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			panic(err)
		}
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			answer := map[string]any{"id": r.ID}
			if result, err := ops[r.Op](ctx, r); err != nil {
				answer["error"] = err.Error()
			} else {
				answer["result"] = result
			}
			saying.Lock()
			defer saying.Unlock()
			_ = json.NewEncoder(os.Stdout).Encode(answer)
		}()
	}
	if n.host != nil {
		_ = n.host.Close()
	}
}
