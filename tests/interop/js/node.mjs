// Be one js-libp2p node that does what the tests say: a JSON object a line comes in, one a line goes out.
//
//     {"id": 1, "op": "dial", "address": "/ip4/…"}   ->   {"id": 1, "result": …} or {"id": 1, "error": "…"}
//
// It ends when its standard input does.  Every operation is a function of `ops`, below.

import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import { createHash } from 'node:crypto'
import { createInterface } from 'node:readline'

const PATIENCE = 20_000 // milliseconds for anything asked of another node
const PIECE = 65_536 // bytes handed to a stream at once

let node
const inTime = () => ({ signal: AbortSignal.timeout(PATIENCE) })
const where = (given) => given.startsWith('/') ? multiaddr(given) : peerIdFromString(given)

const ops = {
  async start ({ listen = ['/ip4/127.0.0.1/tcp/0'], relay = false, server = true }) {
    node = await createLibp2p({
      addresses: { listen },
      transports: [tcp(), circuitRelayTransport()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      services: {
        identify: identify(),
        ping: ping(),
        dht: kadDHT({
          protocol: '/ipfs/kad/1.0.0',
          clientMode: !server,
          peerInfoMapper: passthroughMapper // addresses of this machine are addresses, too
        }),
        ...(relay ? { relay: circuitRelayServer() } : {})
      }
    })
    return ops.whoami()
  },

  whoami: async () => ({
    peer: node.peerId.toString(),
    addresses: node.getMultiaddrs().map(String)
  }),

  async dial ({ address }) {
    const connection = await node.dial(where(address), inTime())
    return {
      peer: connection.remotePeer.toString(),
      limited: connection.limits != null,
      encryption: connection.encryption,
      muxer: connection.multiplexer
    }
  },

  ping: async ({ address }) => await node.services.ping.ping(where(address), inTime()),

  async known ({ peer }) {
    const { metadata, protocols, addresses } = await node.peerStore.get(where(peer))
    return {
      agent: new TextDecoder().decode(metadata.get('AgentVersion')),
      protocols,
      addresses: addresses.map(({ multiaddr }) => multiaddr.toString())
    }
  },

  // Send `size` bytes as fast as the stream takes them: how often it was full, and what was said to that.
  async flood ({ address, protocol, size }) {
    const stream = await node.dialProtocol(where(address), protocol, inTime())
    let waits = 0
    for (let sent = 0; sent < size; sent += PIECE) {
      if (!stream.send(new Uint8Array(Math.min(PIECE, size - sent)).fill(sent / PIECE))) {
        waits++
        await stream.onDrain(inTime())
      }
    }
    await stream.close(inTime())
    return { waits, said: (await all(stream)).toString() }
  },

  // Send these bytes and tell the `count` bytes that came back.
  async talk ({ address, protocol, send, count }) {
    const stream = await node.dialProtocol(where(address), protocol, { ...inTime(), runOnLimitedConnection: true })
    stream.send(Buffer.from(send, 'hex'))
    let got = Buffer.alloc(0)
    for await (const part of stream) {
      got = Buffer.concat([got, part.subarray()])
      if (got.length >= count) break
    }
    await stream.close(inTime())
    return got.toString('hex')
  },

  // Give back on `protocol` whatever comes.
  async echo ({ protocol }) {
    await node.handle(protocol, async (stream) => {
      for await (const part of stream) {
        if (!stream.send(part)) await stream.onDrain(inTime())
      }
      await stream.close(inTime())
    }, { runOnLimitedConnection: true })
  },

  // Take on `protocol` whatever comes, but nothing at all before `resume`; answer what it was.
  async swallow ({ protocol }) {
    await node.handle(protocol, async (stream) => {
      stream.pause()
      await new Promise((resolve) => { ops.resume = async () => resolve() })
      stream.resume()
      const data = await all(stream)
      stream.send(Buffer.from(JSON.stringify({
        bytes: data.length, sha256: createHash('sha256').update(data).digest('hex')
      })))
      await stream.close(inTime())
    })
  },

  provide: async ({ cid }) => await node.contentRouting.provide(CID.parse(cid), inTime()),

  async find ({ cid }) {
    const found = {}
    for await (const { id, multiaddrs } of node.contentRouting.findProviders(CID.parse(cid), inTime())) {
      found[id.toString()] = multiaddrs.map(String)
    }
    return found
  },

  connections: async () => node.getConnections().map((c) => ({
    peer: c.remotePeer.toString(), address: c.remoteAddr.toString(), limited: c.limits != null
  }))
}

async function all (stream) {
  const parts = []
  for await (const part of stream) parts.push(part.subarray())
  return Buffer.concat(parts)
}

const say = (answer) => process.stdout.write(JSON.stringify(answer) + '\n')

async function perform ({ id, op, ...args }) {
  try {
    say({ id, result: await ops[op](args) ?? null })
  } catch (trouble) {
    say({ id, error: `${trouble.name}: ${trouble.message}` })
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  void perform(JSON.parse(line))
}
await node?.stop()
process.exit(0)
