//! A write whose answer was lost may still be executed seconds later. It must
//! never undo a newer one: the sequence number fences it off.
//!
//! The emulator cuts writes and executes them late, over newer data, all
//! conditions judged only then. The same workload through a client that does
//! not fence shows that the test can see the damage.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::emulated;
use bytes::Bytes;
use dysk::blob::{Checksum, Conditions, LeaseId, PageBlob};
use dysk::device::BlockDevice;
use dysk::emulator::{Effect, LateStats, Operation, Rule, Running};
use dysk::volume::{OpenOptions, Volume};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;
const DEADLINE: Duration = Duration::from_secs(5);
const DELAY: Duration = Duration::from_millis(700);

/// How many times each block is overwritten; a soak run sets more.
fn rounds() -> u32 {
    match std::env::var("DYSK_LATE_ROUNDS") {
        Ok(text) => text.parse().expect("DYSK_LATE_ROUNDS is a number"),
        Err(_) => 30,
    }
}

const SEED: u64 = 2026;

/// A store, and an empty blob in it that page writes to from now on may reach
/// late.
async fn store() -> (Running, PageBlob) {
    let (emulator, blob) = emulated::blob("late.img", BLOCKS * BLOCK).await;
    let late = Effect::late(DELAY);
    println!("seed {SEED}");
    emulator
        .faults()
        .set(vec![Rule::on(Operation::PutPage, late).chance(0.2, SEED)]);
    (emulator, blob)
}

fn content(block: u64, round: u32) -> Bytes {
    let mut data = vec![0; usize::try_from(BLOCK).expect("small")];
    data[..8].copy_from_slice(&block.to_be_bytes());
    data[8..12].copy_from_slice(&round.to_be_bytes());
    data.into()
}

/// Waits until no late write is left to come.
async fn settled(emulator: &Running) -> LateStats {
    let give_up = Instant::now() + Duration::from_secs(30);
    loop {
        let late = emulator.stats().late;
        if late.applied + late.refused == late.scheduled {
            return late;
        }
        assert!(
            Instant::now() < give_up,
            "late writes do not come to an end: {late:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits for every late write to have been tried, then counts the blocks that
/// do not hold their last acknowledged content.
async fn undone(emulator: &Running, blob: &PageBlob, last: u32) -> u64 {
    emulator.faults().clear();
    let late = settled(emulator).await;
    println!("{late:?}");
    assert!(late.scheduled > 0, "no write came late: nothing was tested");
    let mut undone = 0;
    for block in 0..BLOCKS {
        let range = dysk::blob::Range::at(block * BLOCK, BLOCK);
        let read = blob
            .get_range(range, Checksum::Off, &Conditions::default(), DEADLINE)
            .await
            .expect("the block is read");
        undone += u64::from(read.pieces.concat() != content(block, last));
    }
    undone
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_write_never_undoes_a_newer_one() {
    let (emulator, blob) = store().await;
    let last = rounds();
    let options = OpenOptions::new(LeaseId::random());
    let volume = Volume::open(blob.clone(), options)
        .await
        .expect("the volume opens");
    let writers: Vec<_> = (0..BLOCKS)
        .map(|block| {
            let volume = Arc::clone(&volume);
            tokio::spawn(async move {
                for round in 1..=last {
                    let data = content(block, round);
                    volume
                        .write(block * BLOCK, data, false)
                        .await
                        .expect("i/o waits, it never fails");
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("the writer ends");
    }
    volume.close().await.expect("the lease is released");
    assert_eq!(undone(&emulator, &blob, last).await, 0, "blocks undone");
    let late = emulator.stats().late;
    assert_eq!(late.refused + late.applied, late.scheduled);
    assert!(late.refused > 0, "the fence refused nothing: {late:?}");
}

/// The same without the fence: what a client with plain retries does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_fence_late_writes_do_their_damage() {
    let (emulator, blob) = store().await;
    let last = rounds();
    let lease = LeaseId::random();
    blob.acquire_lease(&lease, None, &Conditions::default(), DEADLINE)
        .await
        .expect("the lease is had");
    let writers: Vec<_> = (0..BLOCKS)
        .map(|block| {
            let (blob, conditions) = (blob.clone(), Conditions::lease(&lease));
            tokio::spawn(async move {
                for round in 1..=last {
                    let data = content(block, round);
                    while blob
                        .put_page(
                            block * BLOCK,
                            data.clone(),
                            Checksum::Off,
                            &conditions,
                            DEADLINE,
                        )
                        .await
                        .is_err()
                    {}
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("the writer ends");
    }
    assert!(
        undone(&emulator, &blob, last).await > 0,
        "the test cannot see the damage"
    );
}

/// A killed daemon's last write may run ahead of the blob's number, and its
/// successor has the same lease: only the number keeps the write out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_daemon_left_on_its_way_is_kept_out() {
    let (emulator, blob) = store().await;
    emulator.faults().clear();
    let lease = LeaseId::random();
    let killed = Volume::open(blob.clone(), OpenOptions::new(lease.clone()))
        .await
        .expect("the volume opens");
    let number = blob
        .properties(&Conditions::default(), DEADLINE)
        .await
        .expect("the properties are read")
        .sequence_number;
    emulator
        .faults()
        .set(vec![Rule::on(Operation::PutPage, Effect::late(DELAY))]);
    // 64: as far as any write's bound runs ahead.
    let conditions = Conditions {
        if_sequence_number_lt: Some(number + 64 + 1),
        ..Conditions::lease(&lease)
    };
    blob.put_page(0, content(0, 1), Checksum::Off, &conditions, DEADLINE)
        .await
        .expect_err("its answer is lost");
    // Its process is gone: nobody releases anything.
    std::mem::forget(killed);
    emulator.faults().clear();

    let options = OpenOptions {
        resume: true,
        ..OpenOptions::new(lease)
    };
    let volume = Volume::open(blob.clone(), options)
        .await
        .expect("the lease is renewed");
    volume
        .write(0, content(0, 2), false)
        .await
        .expect("the successor writes");
    let late = settled(&emulator).await;
    assert_eq!((late.scheduled, late.refused), (1, 1), "{late:?}");
    let read = volume.read(0, 4096).await.expect("the block is read");
    assert_eq!(read.to_bytes(), content(0, 2), "the newer write was undone");
    volume.close().await.expect("the lease is released");
}
